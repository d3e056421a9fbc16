#pragma once

#include "qcow/image_spec.h"

namespace qcow {

/// The gate for the files that an image names, as ImageSpec::untrusted says it.
Gate gate_for(const ImageSpec& spec, bool force_share);

}  // namespace qcow
