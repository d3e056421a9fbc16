#include "qcow/storage.h"

#include "base/try.h"

namespace qcow {

Result<void> Storage::allocate(HostOffset at, std::uint64_t length) {
    return at.value + length > TRY(size()) ? resize(at.value + length) : Result<void>();
}

Result<std::uint64_t> Storage::copy_from(const Storage&, HostOffset, HostOffset, std::uint64_t) { return 0; }

}  // namespace qcow
