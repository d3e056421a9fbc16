#pragma once

#include "qcow/image_spec.h"

namespace qcow {

/// The gate for the files that an image names, as ImageSpec::untrusted says it.
Gate gate_for(const ImageSpec& spec, bool force_share);

/// ImageSpec::keys, which is told what the names in `spec` say: KeyRequest::image and secret. Unset if it is.
KeySource keys_for(const ImageSpec& spec);

}  // namespace qcow
