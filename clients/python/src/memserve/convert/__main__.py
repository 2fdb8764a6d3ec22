import sys

from memserve.convert.cli import main

sys.exit(main())
