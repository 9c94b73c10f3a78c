"""`mmslak complexity`, for those who have the clone."""

from mmslak.cli.complexity import main

if __name__ == '__main__':
    raise SystemExit(main())
