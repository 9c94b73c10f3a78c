"""`mmslak demo`, for those who have the clone."""

from mmslak.cli.demo import main

if __name__ == '__main__':
    raise SystemExit(main())
