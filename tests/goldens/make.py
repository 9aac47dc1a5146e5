"""Writes transformers.npz beside this file anew, with the torch and transformers that are installed:

    pip install -e '.[parity]'
    PYTHONPATH=tests python -m goldens.make

Only new cases, weights or tokens (cases.py) call for it; tests/parity/test_training_parity.py holds the file and
transformers together.
"""

from goldens import stored
from goldens.cases import REDUCED
from goldens.theirs import Theirs

if __name__ == "__main__":
    stored.write({name: Theirs(case).golden() for name, case in REDUCED.items()})
    print(f"{stored.FILE}: {stored.FILE.stat().st_size} bytes")
