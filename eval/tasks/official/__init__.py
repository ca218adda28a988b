"""Readers of official data-set layouts, one per data set.

A reader turns files into rows and lists the files it needs. It measures nothing.
"""
