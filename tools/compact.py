"""`mmslak compact`, for those who have the clone."""

from mmslak.cli.compact import main

if __name__ == '__main__':
    raise SystemExit(main())
