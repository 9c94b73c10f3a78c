"""`mmslak erf`, for those who have the clone."""

from mmslak.cli.erf import main

if __name__ == '__main__':
    raise SystemExit(main())
