"""Hot code. `reference` says what each operation means; cpu/ and triton/ make it fast."""
