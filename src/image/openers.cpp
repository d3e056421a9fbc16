// One opener for each scheme of a location.

#include <array>

#include "qcow/location.h"
#include "qcow/storage.h"

namespace qcow {
namespace {

using Opener = Result<std::shared_ptr<Storage>> (*)(const Location& location, const FileOptions& options);

Result<std::shared_ptr<Storage>> open_local_file(const Location& location, const FileOptions& options) {
    return open_file(location.path, options);
}

// In the order of the enumeration.
constexpr std::array<Opener, 1> openers = {
    open_local_file,
};

}  // namespace

Result<std::shared_ptr<Storage>> open_storage(const Location& location, const FileOptions& options) {
    return openers[static_cast<std::size_t>(location.scheme)](location, options);
}

}  // namespace qcow
