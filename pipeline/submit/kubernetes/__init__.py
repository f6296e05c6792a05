"""What Kubernetes is sent, and what is wrong with it before it is."""
