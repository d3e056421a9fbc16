#include "base/try.h"
#include "qcow/filesystem.h"

namespace qcow {

Result<ExtractReport> write_tar(FileSystem&, const std::vector<ExtractItem>&, int, const ExtractOptions&) {
    return fail(Errc::unsupported, "tar",
                "qcowkit was built without libarchive, which writes it (Debian: libarchive-dev)");
}

}  // namespace qcow
