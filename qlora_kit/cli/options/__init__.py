"""What verbs with many options take: a module for a verb, a name for an option.

A verb's own file then says in what order it takes them, with which defaults, and what it does.
What several verbs share is in `qlora_kit.cli.arguments`.
"""
