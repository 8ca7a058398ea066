"""`python -m dacnn`."""

from dacnn.cli import main

if __name__ == "__main__":
    main()
