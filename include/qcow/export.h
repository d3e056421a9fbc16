#pragma once

/// Marks what the shared library exports. All other symbols are hidden.
#define QCOW_API __attribute__((visibility("default")))
