"""`mmslak run-demo-detection`, for those who have the clone."""

from mmslak.cli.run_demo_detection import main

if __name__ == '__main__':
    raise SystemExit(main())
