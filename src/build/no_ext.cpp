// In place of the files ext*.cpp, where there is no libext2fs.

#include "build/volume.h"

namespace qcow {
namespace {

std::unexpected<Error> unsupported(const Volume& volume) {
    return fail(Errc::unsupported, volume.name,
                "this build makes no ext file systems; install libext2fs (Debian: libext2fs-dev) and build again");
}

}  // namespace

Result<std::uint64_t> fitted_ext(const Volume& volume) { return unsupported(volume); }
Result<TimeRange> times_of_ext(const Volume& volume) { return unsupported(volume); }
Result<Filled> write_ext(const Volume& volume, PlannedDisk&, std::uint64_t, std::uint64_t) {
    return unsupported(volume);
}

}  // namespace qcow
