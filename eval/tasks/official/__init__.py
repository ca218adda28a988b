"""Readers of official data-set layouts, one per data set; those of segmentation sets are in `eval/tasks/masks.py`.

A reader turns files into rows and lists the files it needs. It measures nothing.
"""
