#pragma once
// Changing what only the header of an image says: the version, the width of refcounts, features.

#include <memory>

#include "qcow/amend.h"
#include "qcow/storage.h"

namespace qcow::qcow2 {

/// Verifies, without a key, that changes of key slots harm nothing: that the image is not marked as corrupt, its
/// refcounts count what there is, and nothing else lies in the clusters of its encryption header. Then overwrites,
/// durably, copies of that header in clusters that nothing uses. An image without such a header stays as it is.
/// Errors: Errc::corrupt, unsupported, cancelled, io.
Result<void> prepare_key_slots(const std::shared_ptr<Storage>& file, const JobControl& control);

/// Verifies that no cluster has more references than refcounts of so many bits can express. The image is sound.
/// Errors: Errc::invalid_argument: a cluster has; corrupt, io.
Result<void> verify_refcounts_fit(const std::shared_ptr<Storage>& file, unsigned bits, const JobControl& control);

/// Makes all changes but those of the size, in the file of an image that is not open. They are possible. The order:
/// version 3, features, refcounts, version 2. Each is durable before the next.
Result<void> amend_header(const std::shared_ptr<Storage>& file, const AmendOptions& options, const JobControl& control);

}  // namespace qcow::qcow2
