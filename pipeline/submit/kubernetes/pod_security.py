"""The "restricted" profile of Kubernetes' Pod Security Standards, control by control, over the pods of a manifest.

A namespace that enforces it refuses a pod at its creation, long after its RayJob was taken, so it is asked here before
anything is sent. Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/ (the profile
"restricted", which includes "baseline"). Besides the profile: a root filesystem that cannot be written, and no token of
the API server where none is needed. What it gives up: Windows pods, SELinux and sysctls are refused whole.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.submit.kubernetes.manifest import Container, Found, Pods, Run, items, section, text, value

VOLUMES = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
MAY_ADD = ("NET_BIND_SERVICE",)
SECCOMP = ("RuntimeDefault", "Localhost")


def restricted(run: Run) -> Iterator[Found]:
    """Everything that the profile refuses in the pods of a run, and the autoscaler's container beside the head."""
    for pods in run.all_pods:
        yield from _pod(pods)
        yield from _volumes(pods)
        for container in pods.all_containers:
            yield from _container(container, pods)
        if not pods.containers:
            yield Found(pods.spec_place, "has no container", "render it again")
    if run.autoscaled:
        options = section(run.cluster, "autoscalerOptions")
        yield from _container(Container(f"{run.at}.autoscalerOptions", options), run.head)
    job = run.job or {"submissionMode": "none"}
    if job.get("submissionMode", "K8sJobMode") == "K8sJobMode" and not job.get("submitterPodTemplate"):
        message = "is missing: KubeRay's own submitter pod is not restricted"
        yield Found("spec.submitterPodTemplate", message, "render it again")


def tokens(run: Run) -> Iterator[Found]:
    """No pod has a token of the API server, but for the head of a cluster that scales itself."""
    for pods in run.all_pods:
        needed = run.autoscaled and pods.role == "head"
        place = f"{pods.spec_place}.automountServiceAccountToken"
        if not needed and pods.spec.get("automountServiceAccountToken") is not False:
            message = "is not false: whatever is trained could ask the API server"
            yield Found(place, message, "set automountServiceAccountToken: false")
        elif needed and pods.spec.get("automountServiceAccountToken") is False:
            yield Found(place, "is false, and the autoscaler asks the API server for pods", "leave it out")


def read_only(run: Run) -> Iterator[Found]:
    """A root filesystem that cannot be written, and /tmp, where Ray writes, that can."""
    for pods in run.all_pods:
        for container in pods.containers:
            if value(container.values, "securityContext.readOnlyRootFilesystem") is not True:
                place = f"{container.place}.securityContext.readOnlyRootFilesystem"
                yield Found(place, "is not true: what runs there could change it", "set it to true")
            elif "emptyDir" not in pods.volumes.get(text(container.mounts.get("/tmp"), "name"), {}):
                message = "has no emptyDir on /tmp, where Ray writes, and the root filesystem is read-only"
                yield Found(f"{container.place}.volumeMounts", message, "mount an emptyDir on /tmp")


def _pod(pods: Pods) -> Iterator[Found]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pods.spec.get(key):
            yield Found(f"{pods.spec_place}.{key}", "is refused: the pod would see its host", "leave it out")
    context, place = section(pods.spec, "securityContext"), f"{pods.spec_place}.securityContext"
    if context.get("runAsUser") == 0:
        yield Found(f"{place}.runAsUser", "is root", "set it to 1000, as in the image")
    for key in ("sysctls", "seLinuxOptions", "windowsOptions"):
        if context.get(key):
            yield Found(f"{place}.{key}", "is not known to be harmless", "leave it out")
    annotations = section(pods.group, "metadata.annotations") | section(pods.group, "template.metadata.annotations")
    for key, profile in annotations.items():
        if str(key).startswith("container.apparmor") and profile == "unconfined":
            yield Found(f"{pods.template_place}.metadata.annotations", f"{key} is unconfined", "leave it out")


def _volumes(pods: Pods) -> Iterator[Found]:
    for number, volume in enumerate(items(pods.spec, "volumes")):
        for kind in sorted(set(volume) - {"name"}):
            if kind not in VOLUMES:
                place = f"{pods.spec_place}.volumes.{number}"
                yield Found(place, f"{kind} is refused", f"one of {', '.join(VOLUMES)}")


def _container(container: Container, pods: Pods) -> Iterator[Found]:
    context, around = section(container.values, "securityContext"), section(pods.spec, "securityContext")
    place = f"{container.place}.securityContext"
    if context.get("privileged"):
        yield Found(f"{place}.privileged", "is refused: it is root on the host", "leave it out")
    if context.get("allowPrivilegeEscalation") is not False:
        yield Found(f"{place}.allowPrivilegeEscalation", "is not false", "set it to false")
    if context.get("runAsNonRoot", around.get("runAsNonRoot")) is not True:
        yield Found(f"{place}.runAsNonRoot", "is not true, here or for the pod", "set runAsNonRoot: true")
    if context.get("runAsUser") == 0:
        yield Found(f"{place}.runAsUser", "is root", "set it to 1000, as in the image")
    profile = section(context, "seccompProfile") or section(around, "seccompProfile")
    if profile.get("type") not in SECCOMP:
        message = f"type is {profile.get('type') or 'not set'}, here or for the pod"
        yield Found(f"{place}.seccompProfile", message, "set type: RuntimeDefault")
    capabilities = section(context, "capabilities")
    if "ALL" not in (capabilities.get("drop") or []):
        yield Found(f"{place}.capabilities.drop", "does not drop ALL", "drop: [ALL]")
    for added in capabilities.get("add") or []:
        if added not in MAY_ADD:
            mend = "leave it out: RDMA needs an unlimited memlock of the container runtime, not IPC_LOCK"
            yield Found(f"{place}.capabilities.add", f"{added} is refused", mend)
    if context.get("procMount", "Default") != "Default":
        yield Found(f"{place}.procMount", "is not Default", "leave it out")
    for key in ("seLinuxOptions", "windowsOptions"):
        if context.get(key):
            yield Found(f"{place}.{key}", "is not known to be harmless", "leave it out")
    for port in items(container.values, "ports"):
        if port.get("hostPort"):
            yield Found(f"{container.place}.ports", f"hostPort {port['hostPort']} is refused", "leave it out")
