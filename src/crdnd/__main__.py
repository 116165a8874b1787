"""`python -m crdnd` is the command `crdnd`."""

from crdnd.cli import main

if __name__ == "__main__":
    main()
