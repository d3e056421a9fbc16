// In place of spec.cpp, where there is no toml++.

#include "base/try.h"
#include "qcow/build.h"

namespace qcow {

Result<BuildSpec> parse_build_spec(std::string_view, const std::string& name, const std::string&) {
    return fail(Errc::unsupported, name,
                "this build reads no specifications; install toml++ (Debian: libtomlplusplus-dev) and build again");
}

}  // namespace qcow
