"""The commands behind ``python -m fastkm``; nothing here is imported by the library itself."""
