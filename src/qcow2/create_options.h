#pragma once

#include "format/header.h"
#include "qcow/create.h"

namespace qcow::qcow2 {

/// The header that an image with these options begins with, table offsets still missing. Errc::invalid_argument for
/// what is out of range or excludes each other.
Result<format::Header> header_for(const CreateOptions& options);

}  // namespace qcow::qcow2
