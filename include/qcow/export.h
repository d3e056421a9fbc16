#pragma once

/// Marks what the shared library offers; everything else stays hidden in it.
#define QCOW_API __attribute__((visibility("default")))
