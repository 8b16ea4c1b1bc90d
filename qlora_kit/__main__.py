"""`python -m qlora_kit` and `accelerate launch -m qlora_kit`."""

from qlora_kit.cli import main

main()
