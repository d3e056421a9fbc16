// In place of tls.cpp, where there is no GnuTLS.

#include "base/try.h"
#include "server/nbd/tls.h"

namespace qcow::nbd {

Result<std::unique_ptr<Tls>> Tls::load(const NbdTls& files) {
    return fail(Errc::unsupported, files.psk_file.empty() ? files.certificates : files.psk_file,
                "this build has no TLS; install GnuTLS (Debian: libgnutls28-dev) and build again");
}

}  // namespace qcow::nbd
