"""What a run will take before it is started: memory of every rank and server, time of every phase.

Pure arithmetic over the settings, the model's shape and a machine file: no torch, no process groups. Parameters per rank are
exact (`config.counting`), memory of state follows from them, and activations and times are estimates whose formulas stand
beside them. docs/clusters.md has the model with its sources, and how far it is off.
"""
