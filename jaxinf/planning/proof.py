"""x"""
def proof_costs(subject):
  return iter(())
