// In place of digest.cpp, where there is no OpenSSL.

#include "base/try.h"
#include "qcow/digest.h"

namespace qcow {
namespace {

std::unexpected<Error> unsupported() {
    return fail(Errc::unsupported, "",
                "this build computes no digests; install OpenSSL 3 (Debian: libssl-dev) and build again");
}

}  // namespace

Result<std::size_t> digest_size(const std::string&) { return unsupported(); }
Result<std::vector<std::byte>> digest_disk(Disk&, const DigestOptions&) { return unsupported(); }
Result<DigestResult> digest(const DigestJob&, const DigestOptions&) { return unsupported(); }

}  // namespace qcow
