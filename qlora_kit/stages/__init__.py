"""The stages that a run goes through before and after training; `qlora_kit.run` tells the order."""
