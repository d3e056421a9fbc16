#pragma once

#include <string>

namespace qcow::fuse {

/// Returns the name of the file of a snapshot that is known by its id. Empty: the id is too long.
std::string id_file_name(const std::string& id);

}  // namespace qcow::fuse
