#pragma once
// Files of this machine as sources of a tree.

#include "build/tree.h"

namespace qcow {

/// Gives an inode of the tree the type, size, time and contents of a regular file, which may be a symbolic link to one.
Result<void> fill_from_file(Tree& tree, TreeInode& inode, const std::string& path);

}  // namespace qcow
