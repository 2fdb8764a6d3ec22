"""Read foreign files. Nothing in them is ever executed, and every size they claim is held against the file."""
