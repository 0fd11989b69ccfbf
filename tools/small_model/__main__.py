"""Prepares the model, unless that was done before, and prints its folder."""

import sys

from tools.small_model import ModelError, prepare_model

if __name__ == "__main__":
    try:
        print(prepare_model())
    except ModelError as error:
        sys.exit(f"error: {error}")
