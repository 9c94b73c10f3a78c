"""`mmslak tune`, for those who have the clone."""

from mmslak.cli.tune import main

if __name__ == '__main__':
    raise SystemExit(main())
