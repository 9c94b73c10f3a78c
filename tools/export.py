"""`mmslak export`, for those who have the clone."""

from mmslak.cli.export import main

if __name__ == '__main__':
    raise SystemExit(main())
