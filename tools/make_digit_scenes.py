"""`mmslak make-digit-scenes`, for those who have the clone."""

from mmslak.cli.make_digit_scenes import main

if __name__ == '__main__':
    raise SystemExit(main())
