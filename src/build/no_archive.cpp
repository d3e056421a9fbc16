// In place of archive.cpp, where there is no libarchive.

#include "build/tree.h"

namespace qcow {

Result<Tree> tree_of_archive(const std::string& path) {
    return fail(Errc::unsupported, path,
                "this build reads no archives; install libarchive (Debian: libarchive-dev) and build again");
}

}  // namespace qcow
