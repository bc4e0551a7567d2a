"""Multiple choice by likelihood."""
