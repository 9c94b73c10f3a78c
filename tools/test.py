"""`mmslak test`, for those who have the clone."""

from mmslak.cli.test import main

if __name__ == '__main__':
    raise SystemExit(main())
