"""``python -m qat2int8`` is ``qat2int8``."""

from qat2int8.tools.cli import main

if __name__ == "__main__":
    main()
