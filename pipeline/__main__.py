"""`python -m pipeline` is `millstream`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
