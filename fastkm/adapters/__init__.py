"""The memory under the names of other programs: `fastkm.adapters.deepmind`, `fastkm.adapters.larimar`."""
