#pragma once
// Errors are values. A function that can fail returns a Result and throws nothing: if memory runs out, it returns
// Errc::no_memory. Functions that the caller passes in must not throw. A function that returns a plain string or object
// (printable, Error::message, memory_storage, local_files, ...) throws std::bad_alloc if memory runs out.

#include <expected>
#include <string>
#include <string_view>
#include <utility>

#include "qcow/export.h"
#include "qcow/offset.h"

namespace qcow {

/// The kind of a failure, for programs. Error::message() is for people.
enum class Errc {
    invalid_argument,   ///< the caller asked for something impossible
    not_found,          ///< there is no such file, snapshot or bitmap
    access_denied,      ///< the operating system forbids it
    locked,             ///< another process has the file open in a way that excludes this use
    read_only,          ///< a write to something that is not open for writing
    no_space,           ///< the file system or quota is full, or the format has no room left
    io,                 ///< the operating system failed a read, write or flush
    corrupt,            ///< the image violates its format
    unsupported,        ///< valid, but this library does not support it
    encrypted,          ///< the data are encrypted, and there is no key or a wrong one
    refused_by_policy,  ///< the image names a file that the caller's policy does not allow
    limit_exceeded,     ///< a limit of the caller or the library on memory, depth or size
    no_memory,          ///< out of memory; an image that was being changed refuses further writes
    cancelled,          ///< the caller stopped the job: see JobControl::stop
};

/// One failure: its kind, its place, and a sentence that says what to do.
struct QCOW_API Error {
    Errc code = Errc::io;
    std::string place;  ///< file, structure and offset, outermost first, separated by ": "
    std::string what;   ///< what is wrong there, and the remedy if there is one

    /// Set by Disk::read and Disk::extent: the bytes of the request that this error makes unreadable. The bytes before
    /// them are readable. Length 0: not known.
    GuestRange unreadable = {};

    /// Returns "place: what" as one line of printable text, whatever strings of the image it contains.
    [[nodiscard]] std::string message() const;

    /// Returns the error with `outer` in front of its place.
    [[nodiscard]] Error in(std::string_view outer) &&;
};

template <class T>
using Result = std::expected<T, Error>;

}  // namespace qcow
