def alike(a: str, b: str, loose: bool = False) -> bool:
    return a.strip() == b.strip()
