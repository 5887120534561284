import sys

from .run.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
