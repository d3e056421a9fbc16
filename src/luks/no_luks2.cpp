// In place of luks2.cpp, where there is no libcryptsetup.

#include "base/try.h"
#include "luks/luks2.h"

namespace qcow::luks {
namespace {

std::unexpected<Error> unsupported() {
    return fail(Errc::unsupported, "LUKS2 header",
                "this build does not read LUKS2; install OpenSSL 3 and libcryptsetup (Debian: libssl-dev, "
                "libcryptsetup-dev) and build again");
}

}  // namespace

Result<Luks2> read_luks2(const Storage&) { return unsupported(); }
Result<double> luks2_key_seconds(const Storage&) { return unsupported(); }
Result<std::shared_ptr<const crypto::SectorCipher>> unlock_luks2(const Storage&, const Secret&, double) {
    return unsupported();
}

}  // namespace qcow::luks
