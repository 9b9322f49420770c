"""The training program around the library: `torchrun train/main.py --config fqt_1bit.yaml`."""
