"""The commands of `pipeline`, each declared where it is carried out."""
