#include "base/try.h"
#include "qcow/filesystem.h"

namespace qcow {

Result<ExtractReport> write_tar(FileSystem&, Inode, const std::string&, int, const ExtractOptions&) {
    return fail(Errc::unsupported, "tar",
                "qcowkit was built without libarchive, which writes it (Debian: libarchive-dev)");
}

}  // namespace qcow
