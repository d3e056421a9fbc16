// Copies the contents of an image, or of one of its snapshots, into a raw file.

#include <cstdio>

#include "qcow/convert.h"
#include "qcow/try.h"

namespace {

qcow::Result<void> extract(const char* source, const char* target, const char* snapshot) {
    qcow::ConvertJob job;
    job.sources = {{.image = {.location = QCOW_TRY(qcow::parse_location(source))}, .snapshot = snapshot}};
    job.target = qcow::NewImage{.path = target, .format = qcow::Format::raw};
    // The target shows up under its name when it is complete, and not before. It may not be a file that is read.
    const auto result = QCOW_TRY(qcow::convert(job));
    std::printf("%s: %llu bytes\n", result.path.c_str(), static_cast<unsigned long long>(result.bytes));
    return {};
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3 && argc != 4) {
        std::fprintf(stderr, "usage: extract IMAGE TARGET [SNAPSHOT]\n");
        return 1;
    }
    if (auto done = extract(argv[1], argv[2], argc == 4 ? argv[3] : ""); !done) {
        std::fprintf(stderr, "%s\n", done.error().message().c_str());
        return 1;
    }
}
